"""Process reward models: trained on labelled steps, used to score them, and the labels made."""

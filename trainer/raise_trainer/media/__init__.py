"""Videos and images on disk: which frames, which decoder, worker processes, cache, quarantine.

Import from the files: a decoding process loads `video.py` and what it needs, and never PyTorch.
"""

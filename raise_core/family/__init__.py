"""Confidence rewards beside SCRE and IGSR: tensors in, a reward for each span out. Table: docs/rewards.md.

    answer.py           of an answer, the model's own or the reference one: likelihood, log-probability, RLPR
    group.py            that compare a prompt's completions: JEPO, NOVER, and RLPR's filter of prompts
    whole_response.py   of everything the model wrote: Intuitor, RENT, EM-RL
    deepconf.py         of its least certain passages, with the vote and the early stop of DeepConf
    pacr.py             of each reasoning step: what it adds to the reference answer's probability
    splice.py           the reference answer, or all options, after the model's own reasoning

Shapes: T scored tokens, packed; S spans; offsets [S+1]; group [S], the prompt of each. Results are fp32
(fp64 for fp64), summed in fp64. A span of no tokens never counts as certain: a probability is then 0, and a
reward that is a logarithm, where 0 would be certainty, is what its `empty` says. A NaN makes the reward of
its own span NaN only.
"""

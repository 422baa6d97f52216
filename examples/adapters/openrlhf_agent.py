"""OpenRLHF: an agent whose reward is SCRE on the rollout's own log-probabilities. Not run with OpenRLHF here.

    --train.agent_func_path examples/adapters/openrlhf_agent.py --algo.advantage.is_correction_enable
    --reward.remote_url examples/adapters/openrlhf_agent.py       # the text score alone: reward_func

As a script it rewards one made-up rollout: python examples/adapters/openrlhf_agent.py
"""

from raise_core.integrations.openrlhf import add_confidence, make_reward_func

reward_func = make_reward_func(kind="multiple_choice", response_start="<|im_start|>assistant\n")

try:
    from openrlhf.utils.agent import SingleTurnAgentExecutor
except ImportError:
    SingleTurnAgentExecutor = object


class AgentExecutor(SingleTurnAgentExecutor):
    """One turn, then the confidence in its answer."""

    async def execute(
        self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None
    ):
        """What OpenRLHF calls for each prompt."""
        output = await super().execute(
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=images
        )
        return add_confidence(
            output, hf_tokenizer, kind="multiple_choice", temperature=sampling_params.temperature
        )


if __name__ == "__main__":
    from raise_trainer import tiny

    tokenizer = tiny.build_tokenizer()
    prompt, answer = tokenizer("Which?")["input_ids"], tokenizer("<answer>B</answer>")["input_ids"]
    rollout = {
        "observation_tokens": prompt + answer,
        "action_ranges": [(len(prompt), len(prompt) + len(answer))],
        "rollout_log_probs": [0.0] * len(prompt) + [-0.1] * len(answer),
        "label": "B",
        "extra_logs": {},
    }
    made = add_confidence(rollout, tokenizer, kind="multiple_choice", temperature=1.0)
    print({name: made[name] for name in ("reward", "scores", "extra_logs")})

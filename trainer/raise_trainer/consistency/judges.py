"""Text-only judges that answer a question from somebody's chain of thought; their replies are kept."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from ..chat_client import ChatClient, PromptRefused, ReplyCache, question_hash
from ..errors import BadRow
from ..rows import Row

INSTRUCTION = """\
You are given a question about a video or a picture that you cannot see, and the reasoning of somebody who \
has seen it. Answer the question from this reasoning alone: give the answer that it leads to, even where you \
think it is wrong.

Question:
{question}

Reasoning:
{chain}

{form} Write the answer alone between <answer> and </answer>. If the reasoning leads to no answer, write \
<answer></answer>."""
FORMS = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text that was read.",
    "free-form": "The answer is short.",
}


def judge_prompt(row: Row, chain: str) -> str:
    """What a judge is asked: the question with its options and the chain, nothing of the original answer."""
    before, _, rest = INSTRUCTION.partition("{question}")
    middle, _, end = rest.partition("{chain}")
    return before + row.question + middle + chain + end.replace("{form}", FORMS[row.problem_type])


class Judge(Protocol):
    """Whoever answers. cache: its replies, by `name` of the prompt."""

    cache: ReplyCache

    def name(self, prompt: str) -> str:
        """Of a prompt put to this judge, in the cache: a hash of both."""
        ...

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[str, str | BadRow]]:
        """Prompts with their replies, or why one cannot be put, as they come; replies are then kept."""
        ...


class ServerJudge:
    """A model behind an OpenAI-compatible endpoint. parallel: requests at a time."""

    def __init__(self, client: ChatClient, *, max_new_tokens: int = 256, parallel: int = 8) -> None:
        self.client, self.cache, self.parallel = client, client.cache, parallel
        self._options = {"max_tokens": max_new_tokens}

    @staticmethod
    def _chat(prompt: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": prompt}]

    def name(self, prompt: str) -> str:
        """See Judge."""
        return self.client.name(self._chat(prompt), **self._options)

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[str, str | BadRow]]:
        """See Judge. UserError when the server gives no answer; what it gave before is kept.

        A request that it refuses (status 400, 413, 422) is a prompt that cannot be put.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            asked = {pool.submit(self.client.reply, self._chat(p), **self._options): p for p in prompts}
            try:
                for done in as_completed(asked):
                    try:
                        reply: str | BadRow = done.result()
                    except PromptRefused as error:
                        reply = BadRow(str(error))
                    yield asked[done], reply
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class ModelJudge:
    """A Hugging Face model, loaded when it is first asked; greedy, `batch` prompts at a time.

    model: id or folder; the files of a folder, by size and time, are part of a question's name.
    """

    def __init__(
        self, model: str, cache: Path, *, max_new_tokens: int = 256, batch: int = 16, dtype: str = "bfloat16"
    ) -> None:
        self.model, self.cache = model, ReplyCache(cache)
        self.max_new_tokens, self.batch, self.dtype = max_new_tokens, batch, dtype
        weights = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
        stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in weights]
        self._self = [model, stamps, max_new_tokens, dtype]

    def name(self, prompt: str) -> str:
        """See Judge."""
        return question_hash({"judge": self._self, "prompt": prompt})

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[str, str | BadRow]]:
        """See Judge. A prompt that is too long, or holds a control token of the model, cannot be put."""
        import torch

        from ..models import load_policy
        from ..prompt_template import PromptTemplate
        from ..prompts import Prompt, PromptBuilder
        from ..rollout import sample
        from ..train_config import check

        if not prompts:
            return
        config = check(
            {
                "model": self.model,
                "data": ["none"],
                "out": ".",
                "dtype": self.dtype,
                "gradient_checkpointing": False,
            }
        )
        policy = load_policy(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        policy.model.eval()
        room = policy.context - self.max_new_tokens
        template = PromptTemplate(text="{question}")
        builder = PromptBuilder(policy.processor, max_length=room, frames=2, template=template)
        longest_first = sorted(prompts, key=len, reverse=True)
        for start in range(0, len(longest_first), self.batch):
            kept = list[tuple[str, Prompt]]()
            for prompt in longest_first[start : start + self.batch]:
                try:
                    kept.append((prompt, builder(_text_row(prompt))))
                except BadRow as error:
                    yield prompt, error
            said = sample(
                policy.model, [built for _, built in kept], group_size=1, temperature=0.0, draws=None,
                max_new_tokens=self.max_new_tokens, eos=policy.eos, suppress=policy.suppress,
            )  # fmt: skip
            for (prompt, _), ids in zip(kept, said.completions, strict=True):
                reply = policy.tokenizer.decode([i for i in ids if i not in policy.eos])
                self.cache.add(self.name(prompt), reply)
                yield prompt, reply


def _text_row(prompt: str) -> Row:
    return Row(
        problem_id="judge", problem=prompt, data_type="text", problem_type="free-form", options=(),
        solution="", path=None, data_source="",
    )  # fmt: skip

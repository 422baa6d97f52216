"""What goes wrong between a run and its vLLM server: each ends with a UserError that says what to do."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raise_trainer.engines import Sampling, VllmServer
from raise_trainer.engines.answers import Answer, Expected, ranks, seed_of, together
from raise_trainer.engines.http_json import HttpJson
from raise_trainer.engines.nccl import NcclChannel
from raise_trainer.errors import UserError
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import draws
from raise_trainer.rows import Row
from tests.tiny_models import VOCAB, media_prompt, text_model, vision_model
from tests.trainer import fake_vllm

EOS, NEVER, LONGEST, TRIES = 1, 190, 4, 3
SAMPLING = Sampling(2, LONGEST, 0.7, (EOS,), (NEVER,))
POLICY = text_model("Qwen2")
DRAWS = draws(0, [(0, 0), (0, 1)], SAMPLING.group_size, LONGEST)


def prompt(ids: list[int], number: int = 7) -> Prompt:
    row = Row(number, "?", "text", "free-form", (), "x", None, "test")
    return Prompt(row, {"input_ids": torch.tensor([ids])}, None)


class Canned:
    """A group of two completions for every prompt, spoiled as a test says."""

    def __init__(self) -> None:
        self.ids, self.logp = [[5, 6, EOS], [7, 8, 9, 10]], [[-0.1, -0.2, -0.3], [-1.0, -2.0, 0.0, -3.0]]

    def load_weights(self, weights: Any) -> None:
        """They do not matter here."""

    def sample(self, ids: list[int], media: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"token_ids": i, "logp": x} for i, x in zip(copy.deepcopy(self.ids), self.logp, strict=True)]


@pytest.fixture
def server() -> Iterator[fake_vllm.FakeServer]:
    with fake_vllm.FakeServer(Canned()) as made:
        yield made


def client(server: fake_vllm.FakeServer, *, timeout: float = 20.0, url: str = "") -> HttpJson:
    return HttpJson(url or server.url, remedy="start it", tries=TRIES, pause=0.0, timeout=timeout)


def connect(server: fake_vllm.FakeServer, **options: Any) -> VllmServer:
    return VllmServer(
        "", POLICY.config, SAMPLING, http=client(server, **options), channel=fake_vllm.FakeChannel(server)
    )


def ready(server: fake_vllm.FakeServer, **options: Any) -> VllmServer:
    made = connect(server, **options)
    made.sync(POLICY, 0)
    return made


def test_what_is_asked_for_and_what_comes_back(server: fake_vllm.FakeServer) -> None:
    rollout = ready(server).sample([prompt([3, 4]), prompt([5])], DRAWS)
    assert rollout.completions == [[5, 6, EOS], [7, 8, 9, 10]] * 2 and rollout.owner == [0, 0, 1, 1]
    assert rollout.sampled_logp is not None
    assert [x.tolist() for x in rollout.sampled_logp] == [[-0.1, -0.2, -0.3], [-1.0, -2.0, 0.0, -3.0]] * 2
    asked = {tuple(body["prompt"]): body for body in server.bodies("/v1/completions")}
    assert {k: body["seed"] for k, body in asked.items()} == {
        (3, 4): seed_of(DRAWS, 0), (5,): seed_of(DRAWS, 2)
    }  # fmt: skip
    wanted = {
        "model": "served", "n": 2, "max_tokens": LONGEST, "temperature": 0.7, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "stop_token_ids": [EOS],
        "logit_bias": {str(NEVER): -100.0}, "return_token_ids": True, "return_weight_versions": True,
    }  # fmt: skip
    assert wanted.items() <= asked[5,].items()


def test_a_seed_is_a_function_of_its_draws_alone() -> None:
    """Which are one of seed, step and place; neighbours, which vLLM counts up from it, are far apart."""
    later = draws(0, [(0, 1)], SAMPLING.group_size, LONGEST)
    assert seed_of(later, 0) == seed_of(DRAWS, 2) != seed_of(DRAWS, 0)
    assert abs(seed_of(DRAWS, 2) - seed_of(DRAWS, 0)) > 1 << 20 and seed_of(None, 5) == 0
    assert seed_of(torch.tensor([[0.5]], dtype=torch.float64), 0) == 1 << 52


def test_a_server_that_is_not_there_is_named_with_the_command() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        http = HttpJson(url, remedy="start it with: vllm serve", tries=2, pause=0.0)
        with pytest.raises(UserError, match=rf"{url}/health: not reachable .*in 2 tries; start it with"):
            VllmServer(url, POLICY.config, SAMPLING, http=http)


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_what_passes_is_tried_again(server: fake_vllm.FakeServer, fault: Any) -> None:
    engine = ready(server)
    server.faults["/v1/completions"] = [fault] * (TRIES - 1)
    assert len(engine.sample([prompt([3])], DRAWS).completions) == 2
    assert server.count("/v1/completions") == TRIES


@pytest.mark.parametrize(
    "fault, message, tries",
    [
        (500, r"answered HTTP 500 \(.*made up.*\), in 3 tries; start it", TRIES),
        ("drop", "not reachable .*in 3 tries; start it", TRIES),
        ("hang", "gave no answer within 0.1 s, in 3 tries", TRIES),
        (400, r"/v1/completions: answered HTTP 400 \(.*made up", 1),
        (404, "HTTP 404", 1),
        (b"<html>", r"answered no JSON \(b'<html>'\); start it", 1),
        (b"[]", "another form than that of vLLM 0.33", 1),
        (b"{}", r"another form .*KeyError: 'choices'", 1),
    ],
)
def test_what_does_not_pass_ends_the_run(
    server: fake_vllm.FakeServer, fault: Any, message: str, tries: int
) -> None:
    engine = ready(server)
    if fault == "hang":
        engine.http.timeout = 0.1
    server.faults["/v1/completions"] = [fault] * 9
    with pytest.raises(UserError, match=message):
        engine.sample([prompt([3])], DRAWS)
    assert server.count("/v1/completions") == tries


def test_tries_wait_twice_as_long_each_time(
    server: fake_vllm.FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr("raise_trainer.engines.http_json.time.sleep", waits.append)
    server.faults["/health"] = [503] * 9
    with pytest.raises(UserError):
        HttpJson(server.url, remedy="", tries=4, pause=0.5).get("/health")
    assert waits == [0.5, 1.0, 2.0]


def _without(path: str) -> Callable[[Any], None]:
    return lambda server: server.faults[path].append(404)


def _configured(part: str, value: Any) -> Callable[[Any], None]:
    return lambda server: server.config.update({part: value})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            _without("/server_info"),
            "VLLM_SERVER_DEV_MODE=1 is missing; start it with: VLLM_SERVER",
        ),
        (_configured("weight_transfer_config", None), "weight transfer None, wanted 'nccl'; start it with"),
        (_configured("weight_transfer_config", {"backend": "ipc"}), "weight transfer 'ipc', wanted 'nccl'"),
        (
            _configured("model_config", {"logprobs_mode": "raw_logprobs", "max_model_len": 9}),
            "--logprobs-mode raw_logprobs, wanted processed_logprobs",
        ),
        (_configured("model_config", {}), "says nothing of 'logprobs_mode'"),
        (lambda server: server.replies.update({"/v1/models": {"data": []}}), "says nothing of"),
    ],
)
def test_a_server_started_in_another_way_is_refused(
    server: fake_vllm.FakeServer, spoil: Callable[[Any], None], message: str
) -> None:
    spoil(server)
    with pytest.raises(UserError, match=message):
        connect(server)


@pytest.mark.parametrize(
    "ids, logp, message",
    [
        ([[5, EOS]], [[-1.0, -1.0]], "1 completions, wanted 2"),
        ([], [], "0 completions, wanted 2"),
        ([[5, EOS], [VOCAB, EOS]], [[-1.0] * 2] * 2, r"completion 1 has token ids \[200\] outside the vocab"),
        ([[5, EOS], [-4, EOS]], [[-1.0] * 2] * 2, r"token ids \[-4\] outside"),
        ([[NEVER, EOS], [5, EOS]], [[-1.0] * 2] * 2, r"completion 0 has token ids \[190\], which must never"),
        ([[5, EOS], [EOS, 5, EOS]], [[-1.0] * 2, [-1.0] * 3], "goes on after its end-of-sequence token"),
        ([[5, EOS], [5, 6]], [[-1.0] * 2] * 2, "stops after 2 tokens without an end"),
        ([[5, EOS], [5] * 5], [[-1.0] * 2, [-1.0] * 5], "has 5 tokens, wanted 1 to 4"),
        ([[5, EOS], []], [[-1.0] * 2, []], "has 0 tokens"),
        ([[5, EOS], [6, EOS]], [[-1.0] * 2, [-1.0]], "1 log-probabilities for 2 tokens"),
        ([[5, EOS], [6, EOS]], [[-1.0] * 2, [-1.0, 0.5]], "above 0 or not finite"),
        ([[5, EOS], [6, EOS]], [[-1.0] * 2, [-1.0, None]], "another form"),
        ([[5, EOS], None], [[-1.0] * 2, []], "another form|TypeError"),
    ],
)
def test_completions_that_cannot_be_used_are_refused(
    server: fake_vllm.FakeServer, ids: Any, logp: Any, message: str
) -> None:
    """By the row's name; nothing is put in their place."""
    engine = ready(server)
    made = [
        {
            "index": i, "token_ids": one, "prompt_token_ids": [3], "logprobs": {"token_logprobs": values},
            "weight_versions": [{"version": server.version}],
        }
        for i, (one, values) in enumerate(zip(ids, logp, strict=True))
    ]  # fmt: skip
    server.replies["/v1/completions"] = {"choices": made}
    with pytest.raises(UserError, match=f"row 7.*{message}"):
        engine.sample([prompt([3])], DRAWS)


@pytest.mark.parametrize("read", [[3, 3], [4], None])
def test_another_prompt_than_was_sent_is_refused(read: Any) -> None:
    answers = [Answer([5, EOS], [-1.0, -1.0], frozenset({"run:0"}))] * 2
    expected = Expected("engine", SAMPLING, VOCAB, "run:0")
    expected.check(prompt([3]), answers, 2, [3])
    with pytest.raises(UserError, match="wanted the 1 that were sent"):
        expected.check(prompt([3]), answers, 2, read)


def test_infinite_log_probabilities_are_refused() -> None:
    expected = Expected("engine", SAMPLING, VOCAB, "run:0")
    for value in (float("nan"), float("-inf")):
        answer = Answer([5, EOS], [-1.0, value], frozenset({"run:0"}))
        with pytest.raises(UserError, match="not finite"):
            expected.check(prompt([3]), [answer], 1, [3])


def test_completions_of_other_weights_are_refused(server: fake_vllm.FakeServer) -> None:
    """The server was restarted, or someone else pushed in between."""
    engine = ready(server)
    for version in ("default", "another run:0"):
        server.version = version
        with pytest.raises(UserError, match=rf"row 7: sampled by weights \['{version}'\], wanted .*:0'"):
            engine.sample([prompt([3])], DRAWS)
    server.version = engine._version
    server._spans = lambda ids: []  # type: ignore[method-assign]
    with pytest.raises(UserError, match="sampled by weights without a version"):
        engine.sample([prompt([3])], DRAWS)


@pytest.mark.parametrize(
    "path, reply, message",
    [
        ("/update_weights", 500, r"/update_weights: answered HTTP 500 .*in 1 tries"),
        ("/finish_weight_update", "drop", "/finish_weight_update: not reachable .*in 1 tries"),
        ("/reset_prefix_cache", {"success": False}, "keeps a prefix cache of other weights"),
        ("/weight_info", {"weight_version": "theirs"}, "has weights 'theirs' after '.*:0' were pushed"),
    ],
)
def test_weights_that_do_not_arrive_end_the_run(
    server: fake_vllm.FakeServer, path: str, reply: Any, message: str
) -> None:
    """What changes the server's weights is not repeated: they may have arrived in part."""
    engine = connect(server)
    if isinstance(reply, dict):
        server.replies[path] = reply
    else:
        server.faults[path] = [reply] * 9
    with pytest.raises(UserError, match=message):
        engine.sync(POLICY, 0)
    assert server.count(path) == 1


def test_every_weight_is_gathered_though_the_push_failed(server: fake_vllm.FakeServer) -> None:
    """In a sharded run the others wait in that gathering."""
    engine, gathered = connect(server), list[str]()
    whole = torch.nn.Linear(2, 2)
    for parameter in whole.parameters():
        parameter.full_tensor = lambda p=parameter: gathered.append("") or p  # type: ignore[attr-defined]
    server.faults["/start_weight_update"] = [500]
    with pytest.raises(UserError):
        engine.sync(whole, 0)
    assert len(gathered) == 2


def test_a_failure_of_one_process_is_raised_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise UserError("mine")

    assert together(lambda: 3) == 3
    with pytest.raises(UserError, match="mine"):
        together(broken)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "of another process"])
    with pytest.raises(UserError, match="of another process"):
        together(lambda: 3)


def test_a_prompt_longer_than_the_servers_context_is_refused(server: fake_vllm.FakeServer) -> None:
    engine = ready(server)
    with pytest.raises(UserError, match=r"row 7 needs 398 \+ 4 tokens, its --max-model-len is 400"):
        engine.sample([prompt([3] * 398)], DRAWS)
    assert server.count("/v1/completions") == 0


def test_media_need_the_routes_of_scale_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    policy = vision_model("Qwen2_5_VL")
    seen = replace(prompt([3]), inputs=media_prompt(policy, videos=[(2, 4, 4)]))
    with fake_vllm.FakeServer(Canned(), scale_out=False) as server:
        engine = VllmServer(
            "", policy.config, SAMPLING, http=client(server), channel=fake_vllm.FakeChannel(server)
        )
        engine.sync(policy, 0)
        with pytest.raises(UserError, match="--enable-scale-out is missing; start it with"):
            engine.sample([seen], DRAWS)


def test_weights_go_by_nccl_from_a_gpu_alone(server: fake_vllm.FakeServer) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device; train on a GPU, or set engine=generate"):
            NcclChannel().open(client(server))


def test_the_meeting_with_the_servers_workers(
    server: fake_vllm.FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides are told of one address and of one process more than the server has workers."""
    met, sent = list[Any](), dict[str, Tensor]()
    group = SimpleNamespace(destroy=lambda: met.append("left"))

    def produce(*, iterator: Any, group: Any, src: int, post_iter_func: Any) -> None:
        sent.update((item[0], post_iter_func(item)) for item in iterator)
        assert group is not None and src == 0

    def rendezvous(*, init_worker: Any, init_trainer: Any) -> None:
        init_worker()
        init_trainer()

    fake_vllm.install(monkeypatch)
    for name, content in {
        "vllm.distributed": {},
        "vllm.utils": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "10.0.0.1", "get_open_port": lambda: 4711},
        "vllm.distributed.weight_transfer.nccl_common": {
            "trainer_init": lambda init: met.append(init) or group,
            "run_trainer_rendezvous": rendezvous,
        },
        "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": produce},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(fake_vllm.sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    channel, announced = NcclChannel(), list[int]()
    channel.open(client(server))
    want = {"master_address": "10.0.0.1", "master_port": 4711, "rank_offset": 1, "world_size": 3}
    assert want.items() <= met[0].items() and met[0]["packed"] is True
    assert server.bodies("/init_weight_transfer_engine") == [{"init_info": met[0]}]
    channel.send(lambda: announced.append(1), iter([("w", torch.ones(2, 2).T)]))
    assert announced == [1] and list(sent) == ["w"]
    channel.close()
    assert met[-1] == "left"

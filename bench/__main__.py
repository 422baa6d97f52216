"""`python -m bench NAME [options]` runs one benchmark; without a name it lists them."""

import sys
from importlib import import_module

BENCHES = {
    "decoders": "decord, torchcodec and PyAV on mp4 files of several sizes",
    "loop": "a whole GRPO step against TRL's GRPOTrainer",
    "ops": "the operations against eager PyTorch and other libraries: time, memory, error",
    "report": "tables and figures of the recorded runs of ops and scoring",
    "soak": "1,200 steps with bad media, killed again and again",
    "rewards": "a reward function against one that runs the model again for each completion",
    "search": "a finished demo in steps: its figures recorded and drawn",
    "scoring": "a group scored once against the prompt repeated for each completion",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        print("python -m bench NAME, one of:", *(f"  {n}  {what}" for n, what in BENCHES.items()), sep="\n")
        return 2
    return int(import_module(f"bench.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())

"""The door: `deepspeed trainer/run.py --stage {1,2,3,probe,all} [--config RECIPE] [--group.name value ...]`."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# The launcher starts this file by its path; the packages lie beside its folder.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def answer(ask: Callable[[], Any]) -> Any:
    """What `ask` gives. A mistake ends here, before torch and the rest are imported, which takes seconds."""
    from trainer.config import UserError

    try:
        return ask()
    except UserError as error:
        rank, of_rank = os.environ.get("RANK", "0"), ""
        if rank != "0":
            time.sleep(5)  # rank 0 has most likely said the same, and the launcher ends the others
            of_rank = f" (rank {rank})"
        print(f"error: {' '.join(str(error).split())}{of_rank}", file=sys.stderr, flush=True)
        sys.exit(2)


def end_before_training(_number: int, _frame: object) -> None:
    """Ctrl-C during the start: nothing has begun that could be lost. The trainer's own handler follows."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by a signal before training; run the same command again\n")
    os._exit(75)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_before_training)
    if any(arg.split("=")[0] == "--cluster" for arg in sys.argv):
        # Before the rest is imported, which sets what a node is to choose for itself.
        from jobs.submit import main as submit

        sys.exit(submit())
    from trainer import chain
    from trainer.config import parse

    if chain.is_asked(sys.argv[1:]):
        sys.exit(answer(chain.main))
    answer(parse)
    from trainer.main import main
    from trainer.ranks.world import end

    end(main())

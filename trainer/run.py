"""Run one stage: `deepspeed trainer/run.py --stage {1,2,3,probe} [--config RECIPE] [--group.name value ...]`."""

import os
import sys

# The launcher starts this file by its path; the packages lie beside its folder.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    if any(arg.split("=")[0] == "--cluster" for arg in sys.argv):
        # Before the rest is imported, which sets what a node is to choose for itself.
        from jobs.submit import main as submit

        sys.exit(submit())
    from trainer.main import main
    from trainer.ranks.world import end

    end(main())

"""`python -m data.write SOURCE OUT.beton`, see `data.write.command`."""

import sys

from data.write.command import main

sys.exit(main())

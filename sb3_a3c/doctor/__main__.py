"""``python -m sb3_a3c.doctor …``."""

import sys

from sb3_a3c.doctor.cli import main

sys.exit(main())

"""``python -m sb3_a3c.zoo COMMAND …``."""

from sb3_a3c.zoo import main

main()

"""``python -m fdconv_deploy`` is the ``fdconv`` command."""

from fdconv_deploy.cli.app import main

main()

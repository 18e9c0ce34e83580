"""`python -m indexcache`."""

from indexcache.cli import main

raise SystemExit(main())

"""Which of these files a process can run.

Triton decides at import whether it interprets kernels. A plain run collects test_interpreted.py,
which runs the test_triton_*.py files in processes of their own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_interpreted.py", "test_static.py"]
    collect_ignore_glob = ["test_on_a_gpu*.py"]
else:
    collect_ignore_glob = ["test_triton_*.py"]

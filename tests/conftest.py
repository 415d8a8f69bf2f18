import os

# Before torch starts: parallel test workers on few cores must not fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

settings.register_profile("lightlm", deadline=None)  # other processes may be at work
settings.load_profile("lightlm")

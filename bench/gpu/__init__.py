"""The steps of ``bench/gpu_check.py``, a file for each kind, and what they share."""

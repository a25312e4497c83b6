"""One folder an op: `naive.py` is the oracle, the other files are fast paths; `__init__.py` names them in order.

Shape legend, used in every file below:
    q [B, Hq, Tq, D] · k, v [B, Hkv, Tk, D] · G = Hq // Hkv · query head h reads KV head h // G
    acc dtype: float64 if the inputs are float64, else float32. `lse` is a natural logarithm, in acc dtype.
"""

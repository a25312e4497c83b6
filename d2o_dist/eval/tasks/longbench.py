class LongBench: pass

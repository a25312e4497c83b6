class Ruler: pass

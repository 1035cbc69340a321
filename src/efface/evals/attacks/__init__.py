"""One file an attack: it tries to bring an erased concept back."""

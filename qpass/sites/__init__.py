"""Sites: where a transformer holds its memory. `find.py` finds them; embedding, linear and kv are rewritten by kind."""

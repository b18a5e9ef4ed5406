"""A grammar of short children's stories: it composes them, and it checks whether a given story makes sense.

`compose` tells a story, `check` reads one, and both work over the same sentences (`sentences`), whose meaning is facts
that must hold and facts that they change (`world`).
"""

"""A mesh as text, "tensor=4,data=2", for command lines. Imports nothing heavy."""

AXES = ("data", "expert", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Devices along each axis of `make_mesh`, from NAME=SIZE entries in any order; axes that are not named have 1.

    Raises `ValueError` naming the entry that is not an axis with a positive size, or that comes twice.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, equals, size = (piece.strip() for piece in entry.partition("="))
        problem = None
        if name not in AXES or not equals:
            problem = f"must be one of {', '.join(AXES)}, an equals sign and a number of devices"
        elif name in sizes:
            problem = f"{name} is there twice"
        elif not (size.isascii() and size.isdigit() and int(size) >= 1):
            problem = "the number of devices must be an integer of at least 1"
        if problem is not None:
            raise ValueError(f"mesh {text!r}: entry {entry.strip()!r}: {problem}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}

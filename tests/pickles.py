"""An object whose unpickling leaves a trace."""

HAPPENED = []


class Ran:
    """Unpickling it is noticed."""

    def __reduce__(self):
        return ran, ()


def ran():
    HAPPENED.append("ran")

"""The one exception for what a person can cause."""


class UserError(Exception):
    """One or two lines: what is wrong, where, and what to do. Ends the program with exit code 2, without a traceback.

    Rank 0 says it for all. Only an error that one rank meets `alone`, while others wait for it, is said by that rank;
    `agreed` marks one that all ranks were told of.
    """

    agreed = False
    alone = False

"""A job before it is in the queue: the request, its checks, the copy of the code, the script."""

"""Parts that end in every way, for `selfcheck_test.py`: apart, so that another process finds them without the tests. No tests here."""

import os
import time


def raise_an_error(send, text):
    send(1)
    raise RuntimeError(f"illegal\n  {text}")


def abort(send):
    send(1)
    send("two")
    os.write(2, b"CUDA_ERROR_ILLEGAL_ADDRESS\n")
    os.abort()


def hang(send):
    time.sleep(1000)

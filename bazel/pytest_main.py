"""Runs pytest for a py_test of BUILD.bazel: on the file that its arguments name, with Bazel's filter and report."""

import os
import sys

import pytest

if __name__ == "__main__":
    # An editable install would find the packages in the checkout, whatever the target names.
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "editable" not in type(finder).__module__
    ]
    options = ["-p", "no:cacheprovider", f"--junitxml={os.environ['XML_OUTPUT_FILE']}"]
    if "TESTBRIDGE_TEST_ONLY" in os.environ:  # bazel test --test_filter
        options += ["-k", os.environ["TESTBRIDGE_TEST_ONLY"]]
    sys.exit(pytest.main([*options, *sys.argv[1:]]))

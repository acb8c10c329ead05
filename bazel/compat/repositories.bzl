"""Repositories without downloads, for Bazel 7 and older without modules: see README.md."""

# What BUILD.bazel loads, and what the tools in Bazel itself load.
_RULES = {
    "rules_cc": [
        "cc/cc_library.bzl",
        "cc/cc_test.bzl",
        "cc/defs.bzl",
    ],
    "rules_java": ["java/defs.bzl"],
    "rules_proto": ["proto/defs.bzl"],
    "rules_python": [
        "python/defs.bzl",
        "python/py_binary.bzl",
        "python/py_library.bzl",
        "python/py_test.bzl",
    ],
}

def _native_rules(context):
    for path in context.attr.files:
        context.file(path.rpartition("/")[0] + "/BUILD.bazel")
        context.symlink(context.attr._rules, path)

_native_rules_repository = repository_rule(
    implementation = _native_rules,
    attrs = {
        "files": attr.string_list(mandatory = True),
        "_rules": attr.label(default = "//bazel/compat:native_rules.bzl"),
    },
    local = True,
)

def _coverage_tools(context):
    context.file("BUILD.bazel", """
[filegroup(
    name = name,
    visibility = ["//visibility:public"],
) for name in ["coverage_report_generator", "lcov_merger"]]
""")

_coverage_tools_repository = repository_rule(implementation = _coverage_tools)

def _installed_packages(context):
    for line in context.read(context.path(context.attr.requirements)).splitlines():
        if not line.startswith("#"):
            name = line.partition("==")[0].replace("-", "_").lower()
            context.file(name + "/BUILD.bazel", """
py_library(
    name = "{name}",
    visibility = ["//visibility:public"],
)
""".format(name = name))

_installed_packages_repository = repository_rule(
    doc = "A target for each package of the lock file. It adds nothing: the host's python3 has the package.",
    implementation = _installed_packages,
    attrs = {"requirements": attr.label(mandatory = True)},
    local = True,
)

def compat_repositories():
    """Defines the repositories that MODULE.bazel names, and those that Bazel would download for its own tools."""
    for name, files in _RULES.items():
        _native_rules_repository(
            name = name,
            files = files,
        )
    _coverage_tools_repository(name = "remote_coverage_tools")
    _installed_packages_repository(
        name = "pypi",
        requirements = "//bazel:requirements.txt",
    )

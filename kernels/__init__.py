"""Triton kernels and their launchers: plain tensors in, plain tensors out.

The folder is installed as ``attnk.kernels``. Nothing here dispatches, validates or knows autograd: that is the work
of ``attnk.ops``.
"""

if __name__ != "attnk.kernels":
    raise ImportError(
        f"the folder 'kernels' of attnk was imported as {__name__!r}; install the project (pip install -e .) and "
        "import 'attnk.kernels', because the bare name belongs to another distribution"
    )

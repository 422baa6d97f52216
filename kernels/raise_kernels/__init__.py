"""Fused reward kernels: tensors in, tensors out; knows no tokenizer and no text."""

# Custom ops must not be registered twice under two names.
if __name__ != "raise_kernels":
    raise ImportError(
        f"imported as {__name__!r}; the package is called 'raise_kernels' (kernels/ is only its folder)"
    )

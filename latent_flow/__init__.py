"""`load(NAME)`: a trained model as a module, from `checkpoints/` or a file of one's own."""


def __getattr__(name: str):
    if name == "load":  # on first use: the scripts start without it
        from latent_flow.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

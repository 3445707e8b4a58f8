"""Makes timm importable where torchvision's compiled operators are not.

timm imports torchvision for its data transforms. On a machine whose torch has no CUDA, the
published torchvision finds its operators missing and refuses to import when it registers
their shape rules. Nothing here uses those operators, so the rules are left out.
"""

try:
    from torch import library, set_num_threads
except ImportError:  # then the tests here skip themselves
    library = None

if library:
    _register = library.register_fake

    def _register_unless_torchvision(name, *args, **kwargs):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return _register(name, *args, **kwargs)

    library.register_fake = _register_unless_torchvision
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    finally:
        library.register_fake = _register
    set_num_threads(2)

"""Where `python -m vit_jax.contact_sheet` was before; the old command goes on working."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vit_jax.contact_sheet", run_name="__main__", alter_sys=True)

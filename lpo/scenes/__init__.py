"""The embedded Scenes world: renderer, captions, judge, and the script that trained its tiny Stable Diffusion."""

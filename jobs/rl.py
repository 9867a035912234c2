"""``nanochat-ray rl`` from a checkout."""

from nanochat_ray.cli import main

if __name__ == "__main__":
    main("rl")

"""``python -m nanochat_ray COMMAND`` is ``nanochat-ray COMMAND``, also under torchrun."""

from nanochat_ray.cli import main

if __name__ == "__main__":
    main()

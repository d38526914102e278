"""What is timed.

    program      a pass of an implementation on a problem, and its bound
    registry     every op of the registry, on its own cases: the kernel and XLA
    baselines    the strongest alternatives to our kernels
    gemma        the model: a block, layers, steps of training and decoding
    calibration  programs whose time is known from elsewhere
    published    kernels of other packages, and the times they published

Each of the last five is a suite: a module that defines `programs()`.
"""

"""Training and evaluation: data sets, augmentation, schedules, checkpoints, the loop, the demo."""

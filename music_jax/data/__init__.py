"""Images in, augmented views out: sources, decoding on the host, augmentation on the device."""

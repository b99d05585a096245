"""Makes augmented views of images: sources, decoding on the host, augmentation on the device."""

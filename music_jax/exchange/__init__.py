"""Export and import of trained backbones, and features of images from them."""

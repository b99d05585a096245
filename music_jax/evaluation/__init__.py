"""What was learned, measured on a frozen backbone."""

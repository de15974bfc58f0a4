"""What a launch should take, predicted from the kernel's own task list."""

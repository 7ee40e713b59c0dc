"""What attach() cannot do by itself in a framework's loop: import the module named after the framework."""

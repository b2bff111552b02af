"""A torch backend on a device that is not there: nothing on it can be read by the host without asking."""

"""The commands `histosge analyse STORE ...`: one module a command; `commands` makes the group of them."""

NAMES = ("digits", "static_mnist", "mnist")

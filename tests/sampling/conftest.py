from hypothesis import settings

# Examples take as long as a shared machine lets them: a time limit per example would only fail by chance.
settings.register_profile("fpdm", deadline=None)
settings.load_profile("fpdm")

"""The reference side: builds, trains and exports reference models, records tensors, compares. Stays in the checkout."""

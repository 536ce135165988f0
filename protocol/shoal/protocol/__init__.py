"""The words every part of Shoal shares: ids, money, errors, canonical form, signing, records."""

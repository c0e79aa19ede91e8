"""What tests of several folders share: data sets, stand-ins, and how near is near."""

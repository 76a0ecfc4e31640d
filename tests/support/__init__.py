"""What tests of several subjects share: servers, proxies and small clients."""

# What differs from rave-safe. Where the modules say something, mkForce says otherwise.
{ lib, pkgs, ... }:
{
  networking.hostName = lib.mkForce "workbench";

  # a network that is not QEMU's
  systemd.network.networks."10-uplink" = lib.mkForce {
    matchConfig.Type = "ether";
    networkConfig.DHCP = "ipv4";
  };

  # Prometheus may have more, and keep it for longer
  services.prometheus.retentionTime = lib.mkForce "30d";
  systemd.services.prometheus.serviceConfig.MemoryMax = lib.mkForce "1G";

  environment.systemPackages = [ pkgs.jq ];
}
